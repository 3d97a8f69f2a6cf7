from cluster.config import StrictModel


class Processing(StrictModel):
    """Placeholder replaced by the processing module."""
