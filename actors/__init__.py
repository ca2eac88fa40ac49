"""Where the algorithm runs: sites, pools of sites, the driver, the cluster."""
