"""Learned routing beside other ways of spending as much global attention."""
