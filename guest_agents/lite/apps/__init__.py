"""The programs of the paper's evaluation: run each as `python3 -m guest_agents.lite.apps.NAME`."""
