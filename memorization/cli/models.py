"""The models that are known by name, and what is known of them: ``python -m memorization models [NAME]``"""

from __future__ import annotations

from memorization.flags import ArgumentParser, Arguments


def main(arguments: Arguments = None) -> None:
    """Parse, look up, print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="all that is known of one model; a YAML file of your own may be given")
    args = parser.parse_args(arguments)
    from memorization.models.spec import find_model, model_names

    if args.name:
        for key, value in vars(find_model(args.name)).items():
            print(f"{key:15} {value}")
        return
    for name in model_names():
        print(f"{name:15} {find_model(name).description}")
