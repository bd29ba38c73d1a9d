import json

import pytest
import torch
from runs import write_data
from transformers import AutoModelForCausalLM

from reflux.trainer.data.chat import Chat
from reflux.trainer.studies.worked_answers import (
    batches,
    load_answers,
    load_model,
    pad,
    save_model,
)


def test_logits_are_those_that_predict_the_responses(talkers, tmp_path):
    """A padded batch against each row alone, in float64."""
    chat, model = Chat(str(talkers / "policy")), load_model(str(talkers / "policy")).double()
    answers = load_answers(write_data(tmp_path), chat, limit=5)
    batch = pad(answers)
    with torch.no_grad():
        got_TV = batch.logits_of(model)
        alone = []
        for a in answers:
            ids = torch.tensor([a.prompt_ids + a.response_ids])
            alone.append(model(ids).logits[0, len(a.prompt_ids) - 1 : -1])
    torch.testing.assert_close(got_TV, torch.cat(alone), rtol=0, atol=1e-9)
    assert batch.target_T.tolist() == [t for a in answers for t in a.response_ids]
    assert all(a.response_ids[-1] == chat.stop_id for a in answers)


def test_every_row_is_in_one_batch_whatever_the_order(talkers, tmp_path):
    answers = load_answers(write_data(tmp_path), Chat(str(talkers / "policy")))
    plain = [b.target_T.tolist() for b in batches(answers, 7)]
    drawn = [b.target_T.tolist() for b in batches(answers, 7, seed=1)]
    assert len(plain) == len(drawn) == 4 and plain != drawn
    assert sorted(sum(plain, [])) == sorted(sum(drawn, []))
    assert [b.target_T.tolist() for b in batches(answers, 7, seed=1)] == drawn


def test_a_saved_folder_is_a_model_with_its_tokenizer(talkers, tmp_path):
    source = str(talkers / "policy")
    save_model(load_model(source), tmp_path / "copy", source)
    assert Chat(str(tmp_path / "copy")).encode("1+2 is") == Chat(source).encode("1+2 is")
    a, b = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (source, tmp_path / "copy")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_rows_without_answers_are_an_error(talkers, tmp_path):
    chat = Chat(str(talkers / "policy"))
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(
        ValueError, match=r"line 1: texts in \['prompt'\]; want prompt and response"
    ):
        load_answers(path, chat)
    for line, words in (
        ("not json", "data.jsonl, line 1: Expecting value, character 1"),
        ("[1]", r"line 1: list \[1\]; want one JSON object"),
        ('{"prompt": "x", "response": 3}', r"line 1: texts in \['prompt'\]"),
        ("", "no rows"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=words):
            load_answers(path, chat)


def test_a_text_with_other_line_breaks_is_one_row(talkers, tmp_path):
    chat, row = Chat(str(talkers / "policy")), {"prompt": "a\u2028b", "response": "c\x85d"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (answer,) = load_answers(tmp_path / "d.jsonl", chat)
    assert answer.response_ids == (*chat.encode(row["response"]), chat.stop_id)


def test_blank_lines_are_no_rows_and_what_is_behind_the_limit_is_not_read(talkers, tmp_path):
    chat, path = Chat(str(talkers / "policy")), tmp_path / "d.jsonl"
    row = json.dumps({"prompt": "a", "response": "b"})
    path.write_text(f"{row}\n\n{row}\nbroken\n\n")
    assert len(load_answers(path, chat, limit=2)) == 2
    with pytest.raises(ValueError, match="line 4: Expecting value"):
        load_answers(path, chat)
