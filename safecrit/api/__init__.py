"""The order of the stages: the only modules that join them. One file for each job a user has."""
