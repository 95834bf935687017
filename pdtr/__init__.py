"""What is practised when: curricula, pre-training and training loops, evaluation, checkpoints and reports."""

__version__ = "0.1.0"
