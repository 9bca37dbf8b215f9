"""How it learns: the CTR task and its loop, on one device or many; checkpoints, warm start."""
