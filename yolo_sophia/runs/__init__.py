"""One training as a process with a folder: its order, its worker, its results, and the scheduler of many."""
