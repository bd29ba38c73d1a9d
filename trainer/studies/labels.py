"""The labels of a cell -> the places where the reports put its run. Two cells in one place would
count as two seeds, or one would hide the other.
"""

from collections.abc import Iterable, Mapping

ATTACK = "seq_kd"  # of a student without that label; defences and ablations are judged by it

# role -> the labels without which the report cannot place such a cell
ROLES = {
    "teacher": ("teacher",),
    "student": ("teacher", "attack"),
    "baseline": ("attack",),
    "start": ("student",),
    "defence": ("defence",),
    "repair": ("teacher",),
    "choices": ("teacher",),
    "proxy": (),
    # rows of report.json without a table
    "knowledge": (),
    "paraphraser": (),
}
# those that a report reads; a cell may have others, which only report.json shows
KNOWN = (
    *("role", "teacher", "attack", "student", "defence", "eta", "ablation", "proxy", "pair"),
    *("control", "start", "family", "seed"),
)

Labels = Mapping[str, str]
Place = tuple[tuple[str, str], ...]  # labels and their values


def places(labels: Labels) -> list[Place]:
    """At most one in the table of diagnoses and one among the runs."""
    found = [_run_place(labels)] if labels.get("role") else []
    if "pair" in labels:
        found.append((("pair", labels["pair"]),))
    return [(*place, ("seed", labels.get("seed", ""))) for place in found if place]


def _run_place(labels: Labels) -> Place:
    """Empty for a run that no table shows."""
    role = labels["role"]
    attack = {"attack": labels.get("attack", ATTACK)} if role == "student" else {}
    if "eta" in labels:  # in the sweep, whatever its teacher is called
        of_sweep = role in ("teacher", "student")
        return _place(role, {"eta": _number(labels["eta"])} | attack) if of_sweep else ()
    if "defence" in labels:  # whatever teacher it guards
        of_defence = role in ("defence", "student")
        return _place(role, {"defence": labels["defence"]} | attack) if of_defence else ()
    if role == "proxy":
        return _place(role, {"proxy": labels.get("proxy", "default")})
    named = {name: labels.get(name, "") for name in ROLES.get(role, ())} | attack
    if not named:
        return ()
    ablation = labels.get("ablation", "default")
    return _place(role, named | ({"ablation": ablation} if ablation != "default" else {}))


def _place(role: str, labels: Labels) -> Place:
    return ("role", role), *labels.items()


def _number(eta: str) -> str:
    try:
        return f"{float(eta) + 0.0:g}"  # -0 is 0
    except ValueError:
        return eta


def of_families(labels: Iterable[Labels]) -> list[str]:
    """The families of a matrix: each has an attack report of its own, with the runs that name none.
    [""] without any, or where a report pools them all.
    """
    labels = list(labels)
    pooled = any({"eta", "ablation"} & set(own) for own in labels)
    families = dict.fromkeys(own["family"] for own in labels if own.get("family"))
    return list(families) if families and not pooled else [""]


def refuse_shared_places(source: object, cells: Iterable[tuple[str, Labels]]) -> None:
    """ValueError where two cells stand in one place of a report. source: named in the message;
    cells: (name, labels).
    """
    taken: dict[Place, str] = {}
    for name, labels in cells:
        for place in places(labels):
            if place in taken:
                same = ", ".join(f"{label} = {value!r}" for label, value in place)
                raise ValueError(
                    f"{source}: {taken[place]} and {name} stand in one place of a report ({same}) "
                    "and would count as two seeds of it; want a label of their own for each (of a "
                    "student another attack, of a teacher another teacher), or another seed"
                )
            taken[place] = name
