"""Calibration scores made by hand, for the tests of rewards and advantages."""

import numpy as np

from reflux.tokenalign.scores import compare_spans
from reflux.trainer.calibration.rewards import calibration_score
from reflux.trainer.phase import CalibrationScore


def scored(proxy, own, stop, n_bytes, counts, span, cal) -> CalibrationScore:
    """r_cal of one text from span sums; the stop's difference is all the proxy's."""
    return calibration_score(
        compare_spans(
            proxy,
            own,
            num_bytes=n_bytes,
            tokens=counts,
            stop_a=stop,
            stop_b=0.0,
            clip=cal.span_clip,
        ),
        span,
        cal,
    )


def score(value: float, n_bytes: int = 10, span=None, stop: float = 0.0) -> CalibrationScore:
    span_value = np.array([value - stop]) if span is None else np.asarray(span, float)
    return CalibrationScore(
        value, value, span_value, np.arange(len(span_value)), stop, n_bytes, 0.0, True
    )
