"""Phase calibrate: rewards, advantages and guards of the teacher's reinforcement fine-tuning."""
