"""How a run is dealt over devices: the mesh, the leaves, the tokens."""
