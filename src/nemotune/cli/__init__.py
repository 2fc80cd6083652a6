"""The command line. `main.py` finds the verb, each verb is one file, and all of them call `nemotune.workflow`."""
