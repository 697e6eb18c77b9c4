"""Core of the pack: tables, files, detection, injection and caching; neither networks nor widgets."""
