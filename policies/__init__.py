"""The mind: encoders, adaptation methods and the actor-critic."""
