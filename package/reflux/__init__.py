"""Set how well a language model can be distilled.

Public names are imported when they are asked for (PEP 562): `import reflux` loads neither torch nor
transformers. `dir(reflux)` lists them; docs/python.md explains them.
"""

import importlib
import importlib.metadata
from typing import Any

_HOME = {  # public name -> the module that has it
    "run": "reflux.trainer.api",
    "check": "reflux.trainer.api",
    "load_config": "reflux.trainer.api",
    "Run": "reflux.trainer.api",
    "Callback": "reflux.trainer.callbacks",
    "StepEvent": "reflux.trainer.callbacks",
    "EvaluationEvent": "reflux.trainer.callbacks",
    "RolloutsEvent": "reflux.trainer.callbacks",
    # a grader of one's own
    "Grade": "reflux.trainer.data.graders",
    "Prompt": "reflux.trainer.data.prompt",
    # losses of a trainer of one's own
    "linear_kl": "reflux.kernels.linear_kl",
    "linear_nll": "reflux.kernels.linear_nll",
    "linear_logprob": "reflux.kernels.linear_logprob",
    "linear_topk_kl": "reflux.kernels.linear_topk_kl",
    "teacher_topk": "reflux.kernels.teacher_topk",
    "token_kl": "reflux.kernels.token_kl",
    "token_logprob": "reflux.kernels.token_logprob",
    "topk_tail_kl": "reflux.kernels.topk_tail_kl",
    "bucket_kl": "reflux.kernels.bucket_kl",
    "class_kl": "reflux.tokenalign.class_losses",
    "span_likelihood_kl": "reflux.tokenalign.span_losses",
    # two tokenizers on one text
    "ByteTable": "reflux.tokenalign.byte_table",
    "encode_text": "reflux.tokenalign.byte_table",
    "side": "reflux.tokenalign.offsets",
    "align_spans": "reflux.tokenalign.spans",
    "sequence_scores": "reflux.tokenalign.scores",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("reflux-llm")
    if name not in _HOME:
        raise AttributeError(f"module 'reflux' has no attribute {name!r}; it has {__all__}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
