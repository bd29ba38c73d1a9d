"""The calibration rewards by name (calibration.reward). A new one is a file in calibration/ whose
class implements reflux.trainer.phase.CalibrationReward, and one line here.
"""

REWARDS = {
    # log-likelihood of the text under the proxy minus that under the teacher, equation (2)
    "likelihood_ratio": "reflux.trainer.calibration.likelihood_ratio:LikelihoodRatio",
    # a rival for comparison (RLT): log-likelihood of the solution behind the text under the proxy
    "solution_likelihood": "reflux.trainer.calibration.solution_likelihood:SolutionLikelihood",
}
