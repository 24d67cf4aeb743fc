"""Scene files, navigation meshes and procedural homes."""
