"""The commands of ``dcpsvc``, by what they are for: thin over :mod:`dcpsvc.tools`."""
