"""What the commands do: training, imitation, evaluation, reports."""
