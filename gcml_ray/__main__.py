"""``python -m gcml_ray`` is ``gcml``: for machines where the script is not on the path."""

from gcml_ray.cli.main import main

if __name__ == "__main__":
    main()
