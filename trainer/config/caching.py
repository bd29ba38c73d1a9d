"""The table [cache] of a configuration: what `phase = "cache"` writes of a teacher."""

from dataclasses import dataclass
from typing import Literal

from .checks import above_zero, positive


@dataclass(frozen=True)
class CacheSection:
    # whose texts: the `response` of [data], or rollout.group answers of the teacher to each prompt
    texts: Literal["dataset", "teacher"] = "teacher"
    # bucket: the top_k likeliest ids and the exact log-mass of all others. sampled: top_k
    # independent draws with their counts, an unbiased sample of the whole distribution
    tail: Literal["bucket", "sampled"] = "bucket"
    top_k: int = 64  # likeliest tokens that are kept of each position
    temperature: float = 1.0  # of the log-probabilities; a student has to train at the same one
    # how log-probabilities are stored; float32 is exact, float16 is off by 2**-11 of their size,
    # uint8 by a 508th of the distance between a position's first and last one. Counts are exact
    logp: Literal["float32", "float16", "uint8"] = "float16"
    # prompts of a shard: what an interrupted run may have to write again
    shard: int = 256

    def __post_init__(self):
        positive(self, "top_k", "shard")
        above_zero(self, "temperature")
