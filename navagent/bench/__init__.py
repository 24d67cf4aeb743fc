"""How fast training is, side by side with other learners: what ``navagent bench`` does."""
