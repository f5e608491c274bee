"""Running a routed model: the key/value cache and generation."""
