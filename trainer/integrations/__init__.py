"""Our losses in the trainers of others: one import each, against a pinned version of theirs.

    transformers_trainer   DistillTrainer, a transformers Trainer with a teacher
    trl_losses             TRL's DistillationTrainer and GKDTrainer with our loss in theirs' place
    trl_rewards            the calibration reward as a reward function of TRL's GRPOTrainer
    verl_losses            top-k losses with a tail, and fused log-probabilities, in verl
    verl_plugin            brings them into verl's processes when it is imported
    axolotl_plugin         axolotl's SFT trainer with a teacher, by its YAML file
    axolotl_trainer        the trainer that the plugin names
    torchtitan_loss        a head and a loss for torchtitan's own Trainer

A plain loop is an example of docs/kernels.md. Here is no trainer of ours: the losses import
`reflux.kernels` and the system they are for, the reward also what scores a text under two
tokenizers.
"""
