"""Datalists and the layouts they are made from; a case checked, loaded and kept; patches; phantom sites."""
