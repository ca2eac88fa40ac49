"""Where the algorithm runs: sites, pools of sites, the driver, the cluster."""

import os

# Ray tells of a dead process in a long paragraph on stdout, where the driver needs one line of the log.
# Ray reads this when it is imported, so it stands here.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
