"""The Locust user, from its workload to real runs of Locust."""
