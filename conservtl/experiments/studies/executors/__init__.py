"""Where the runs of a study are executed: in processes of this machine, or by any ``concurrent.futures`` executor."""
