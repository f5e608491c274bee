"""The study on real weights: rows that are run and reported, and the instruments that explain them."""
