"""Root conftest: loads the suite's plugin, so that its options exist whatever part of the tests is run."""

pytest_plugins = ["quantdet.plugin"]
