"""Communication Manager: the link to the cloud, updates and orchestration of the Unit."""
