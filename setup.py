"""Install the folders beside ldm/ inside of it. pyproject.toml has everything else.

The configurations, the weights of the nano model, the tools and the two scripts are installed as ldm/bundled, under the
same paths as in the repository. The installation therefore adds a single name to site-packages, and a script finds the
same files below ldm.files.paths.ROOT in both. The data sets, the benchmark and the tools that trained the nano model
are not installed.
"""

from setuptools import find_namespace_packages, find_packages, setup

bundled = find_namespace_packages(
    include=["configs*", "models.nano", "tools*"], exclude=["tools.benchmark*", "tools.nano*"]
)

setup(
    script_name="setup.py",  # keeps this file out of ldm.bundled
    packages=[*find_packages(include=["ldm*"]), "ldm.bundled", *(f"ldm.bundled.{name}" for name in bundled)],
    package_dir={
        "ldm.bundled": ".",  # the two scripts
        **{f"ldm.bundled.{name}": name.replace(".", "/") for name in bundled},
    },
    package_data={
        "": ["*.cc", "*.css", "*.h", "*.html", "*.gz", "*.js", "*.json", "*.safetensors", "*.yaml", "py.typed"]
    },
)
