"""Records what real Habitat answers about scenes, in the format that :mod:`navagent.recordings` reads."""
