"""``python -m torchconv.catalog``: bring the README's table of methods up to date."""

from torchconv.catalog.tables import update

if __name__ == "__main__":
    print("README.md:", "updated" if update("README.md") else "up to date")
