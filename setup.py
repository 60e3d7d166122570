"""Package metadata, read from settings.ini so that it stands in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
project = parser["DEFAULT"]
EXTRAS = ["dev", "wandb", "trackio", "8bit", "torchao", "deepspeed", "xformers", "jax"]

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=project["author"],
    url=f"https://github.com/{project['user']}/{project['repo']}",
    keywords=project["keywords"],
    license="Apache-2.0",
    packages=find_packages(include=["diffusion_lessons", "diffusion_lessons.*"]),
    include_package_data=True,
    python_requires=f">={project['min_python']}",
    install_requires=project["requirements"].split(),
    extras_require={extra: project[f"{extra}_requirements"].split() for extra in EXTRAS},
    entry_points={
        "console_scripts": project["console_scripts"].split(),
        # by this nbdev knows the names that it makes links of on the site
        "nbdev": [f"{project['lib_name']}={project['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
