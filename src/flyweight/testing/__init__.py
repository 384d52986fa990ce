"""For our tests and plug-in authors': conformance suites, fault injectors, a zoo of small awkward models."""
