"""The world: scenes, simulators, the PointNav task and its environments."""
