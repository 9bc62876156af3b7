"""What computes rows. Device trouble never leaks above this package."""
