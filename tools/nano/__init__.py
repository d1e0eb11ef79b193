"""The tools that trained and measure the nano model."""
