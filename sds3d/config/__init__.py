"""What a user can set: the tree of settings, its files, and what reads and checks them."""
