"""Phase cache: a teacher's rows for given texts, or for texts that it samples, written to
<folder>/cache (teacher_cache.py). The model of [model] is the teacher; no weight moves.

Prompts are taken in the order of their source, cache.shard of them at a time. Each rank samples and
scores its part of a shard and writes a file of its own; the main rank then names the shard in
cache.json. A run that goes on leaves named shards as they are. Sampled texts are those of a
distillation with a query budget of all prompts.

Shapes: T tokens of a batch, K entries of a position, n tokens of a text.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.kernels.teacher_sample import teacher_sample
from reflux.kernels.teacher_topk import TopK, teacher_topk
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Prompt, Rollout, Sample, TeacherView, TopKRows, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.training_prompts import load_training_prompts
from reflux.trainer.losses import HeadInputs
from reflux.trainer.phase import Engine, Sampler, Sampling
from reflux.trainer.rollouts.generate import EmbeddedSampler, given_rollout
from reflux.trainer.runs.files import to_json
from reflux.trainer.runs.progress import progress

from .draws import draw_noise
from .row_codec import Layout, decode_rows, encode_rows, largest_error
from .teacher_cache import (
    CachedText,
    Description,
    Shard,
    read_description,
    template_fingerprint,
    tokenizer_fingerprint,
    write_description,
    write_rows,
)

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")


@dataclass(frozen=True)
class _Written:
    """What one rank wrote of a shard."""

    name: str
    sha256: str
    texts: int
    tokens: int
    error: float


class CachePhase:
    """All of its work is one close_step."""

    exit_code = 0

    def __init__(self, cfg: Config, engine: Engine):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.cache
        self.chat = Chat.of(cfg.model)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.sampler: Sampler = EmbeddedSampler(engine.gathered_weights, self.chat)
        self.prompts = load_training_prompts(cfg, self.chat, engine)
        self.folder = Path(cfg.folder) / "cache"

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        """Writes what is missing. Returns counts, and the largest error of a stored
        log-probability. Collective.
        """
        description = self._start()
        total = len(self.prompts) * self._group
        with progress(self.engine.is_main and not self.cfg.log.quiet) as stage:
            with stage("texts of the teacher", total) as advance:
                advance(sum(s.texts for s in description.shards))
                for first in range(0, len(self.prompts), self.spec.shard):
                    if not any(s.first == first for s in description.shards):
                        shard = self._write_shard(first, description.layout)
                        description = description.with_shard(shard)
                        self._save(description)
                        advance(shard.texts)
        self._save(replace(description, complete=True))
        return {
            "cache/texts": sum(s.texts for s in description.shards),
            "cache/tokens": sum(s.tokens for s in description.shards),
            "cache/bytes": sum(p.stat().st_size for p in self.folder.glob("rows-*.arrow")),
            "cache/error": description.error,
        }

    @property
    def _group(self) -> int:
        return self.cfg.rollout.group if self.spec.texts == "teacher" else 1

    def _start(self) -> Description:
        """The description to go on with: what an earlier start left, or a new one."""
        first = self.engine.rank == 0
        found = self.engine.gather([read_description(self.folder)] if first else [])[0]
        found = self.engine.once_per_row(lambda: found)
        description = self._description()
        if found is not None:
            _check_same(found, description, self.folder)
            return found
        if self.engine.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._copy_tokenizer()
        self._save(description)
        self.engine.gather([])  # no rank writes into a folder that is not there yet
        return description

    def _description(self) -> Description:
        cfg, spec, r = self.cfg, self.spec, self.cfg.rollout
        texts: dict[str, Any] = {"made_by": spec.texts, "max_tokens": r.max_tokens}
        if spec.texts == "teacher":
            texts |= {"group": r.group, "temperature": r.temperature, "seed": cfg.seed}
            texts |= {"top_p": r.top_p, "top_k": r.top_k}
        return Description(
            teacher=dict(self.engine.inputs.get("teacher", {"path": cfg.model.path, "files": {}})),
            tokenizer=tokenizer_fingerprint(self.chat),
            template=template_fingerprint(self.chat),
            vocab_size=self.engine.vocab_size,
            tail=spec.tail,
            top_k=spec.top_k if spec.tail == "sampled" else self._width,
            temperature=spec.temperature,
            logp="counts" if spec.tail == "sampled" else spec.logp,
            texts=texts,
        )

    @property
    def _width(self) -> int:
        return min(self.spec.top_k, self.engine.vocab_size)

    def _copy_tokenizer(self) -> None:
        source = Path(self.cfg.model.path)
        for name in ("config.json", *self.engine.inputs.get("teacher", {}).get("files", {})):
            if not name.endswith(WEIGHTS) and (source / name).is_file():
                shutil.copyfile(source / name, self.folder / name)

    def _save(self, description: Description) -> None:
        if self.engine.is_main:
            write_description(self.folder, description)

    # a shard
    def _write_shard(self, first: int, layout: Layout) -> Shard:
        """Collective."""
        engine, last = self.engine, min(first + self.spec.shard, len(self.prompts))
        mine = [self.prompts[i] for i in range(first + engine.rank, last, engine.world)]
        texts = self._with_rows(self._texts(mine))
        number = first // self.spec.shard
        path = self.folder / f"rows-{number:05d}-{engine.rank:03d}.arrow"
        rows = [x.rows for x in texts]
        read = [decode_rows(encode_rows(x, layout), len(x.ids), layout) for x in rows]
        tokens = sum(len(x.ids) for x in rows)
        digest = ""
        if texts:
            digest = engine.once_per_row(lambda: write_rows(path, texts, layout))
        written = _Written(path.name, digest, len(texts), tokens, largest_error(rows, read))
        all_written = [w for w in engine.gather([written]) if w.texts]
        return Shard(
            first,
            last,
            {w.name: w.sha256 for w in all_written},
            sum(w.texts for w in all_written),
            sum(w.tokens for w in all_written),
            max((w.error for w in all_written), default=0.0),
        )

    def _texts(self, prompts: Sequence[Prompt]) -> list[tuple[int, Rollout]]:
        """(member of its group, text)."""
        cfg, r = self.cfg, self.cfg.rollout
        if self.spec.texts == "dataset":
            return [(0, given_rollout(self.chat, p, r.max_tokens)) for p in prompts]
        sampling = Sampling(r.max_tokens, cfg.seed, 0, r.temperature, r.top_p, r.top_k, r.rows)
        groups = self.sampler.sample(prompts, r.group, sampling)
        return [(g, rollout) for group in groups for g, rollout in enumerate(group)]

    def _with_rows(self, texts: Sequence[tuple[int, Rollout]]) -> list[CachedText]:
        """Collective."""
        samples = [self._sample(rollout) for _, rollout in texts]
        rows: list[TopKRows | None] = [None] * len(texts)
        batches = pack(samples, tokens=self.cfg.batch.tokens, seq_len=self.engine.seq_len)
        for batch in (b.to(self.engine.device) for b in self.engine.pad_across_ranks(batches)):
            topk = self._topk(batch)
            sample_T = batch.sample_T.cpu().numpy()
            ids_TK, logp_TK, tail_T = (x.cpu().numpy() for x in topk)
            for i in np.unique(sample_T):
                own = sample_T == i
                rows[i] = TopKRows(ids_TK[own].astype(np.int64), logp_TK[own], tail_T[own])
        return [
            CachedText(rollout, known, member)
            for (member, rollout), known in zip(texts, rows)
            if known is not None
        ]

    def _sample(self, rollout: Rollout) -> Sample:
        if self.spec.tail != "sampled":
            return Sample(rollout)
        noise = draw_noise(rollout, self.spec.top_k, seed=self.cfg.seed, step=0)
        return Sample(rollout, teacher_views=(TeacherView(rollout.prompt_ids, uniform=noise),))

    def _topk(self, batch: Batch) -> TopK:
        """Of every token of a batch. Collective."""
        engine, spec = self.engine, self.spec
        with engine.forward_no_grad(engine, batch, engine.vocab_size) as out, torch.no_grad():
            options: dict[str, Any] = {"temperature": spec.temperature}
            options["vocab_size"] = out.vocab_size
            if spec.tail == "bucket":
                return teacher_topk(*out[:2], self._width, softcap=out.softcap, **options)
            uniform_TK = self._uniform(batch, out)
            return teacher_sample(
                *out[:2], spec.top_k, softcap=out.softcap, uniform=uniform_TK, **options
            )

    def _uniform(self, batch: Batch, out: HeadInputs) -> Tensor:
        uniform_TK = batch.uniform()
        if uniform_TK is not None:
            return uniform_TK
        return out.hidden_TD.new_zeros(0, self.spec.top_k, dtype=torch.float64)


def _check_same(found: Description, wanted: Description, folder: Path) -> None:
    """ValueError where the shards that are there are of something else."""
    progress_of = ("shards", "complete", "error")
    a, b = (asdict(x) for x in (found, wanted))
    a["teacher"], b["teacher"] = a["teacher"]["files"], b["teacher"]["files"]
    changed = [k for k in a if k not in progress_of and to_json(a[k]) != to_json(b[k])]
    if changed:
        raise ValueError(
            f"{folder} holds shards of another {', '.join(changed)}. Put it back, or start a fresh "
            "folder with on_existing_run = 'new'"
        )
