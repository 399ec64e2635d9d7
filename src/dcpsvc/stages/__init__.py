"""The stages of a checkpoint's life. They never import each other; :mod:`dcpsvc.life` knows the order."""
