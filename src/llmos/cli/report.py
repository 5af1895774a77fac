"""`llmos report`: a signed certificate and an HTML page for a model."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import Session, json_option, print_fields, print_json, with_session


@click.command()
@click.argument("model")
@click.option("--compare", multiple=True, help="Another measured model to show beside it.")
@click.option("--folder", type=click.Path(path_type=Path), help="Default: reports in the home.")
@click.option(
    "--answers",
    type=click.Path(path_type=Path),
    help="What people answer to the questions of a certificate; .toml or .json.",
)
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help="Write the questions as a form for --answers into this file, and do no more.",
)
@json_option
@with_session
def report(
    session: Session,
    model: str,
    compare: tuple[str, ...],
    folder: Path | None,
    answers: Path | None,
    questions: Path | None,
    as_json: bool,
) -> None:
    """Write MODEL's certificate (signed, logged), one HTML page and the registry's record."""
    if questions is not None:
        from llmos.workflows.report import write_questions

        write_questions(questions)
        if as_json:
            print_json({"questions": str(questions)})
        else:
            click.echo(f"Fill it in, then: llmos report {model} --answers {questions}")
        return
    files = session.system().report(model, compare=compare, folder=folder, answers=answers)
    if as_json:
        print_json(files.to_dict())
        return
    if files.certificate is None:
        click.echo(f"{files.reason}: it gets a report and no certificate:")
        print_fields({"page": files.page})
        return
    click.echo(f"Certificate of {model}:")
    shown = {"certificate": files.certificate, "page": files.page, "public_keys": files.public_keys}
    if files.registry is not None:
        shown["registry"] = files.registry
    print_fields(shown)
    if files.tier is None:
        click.echo(f"\nNext: llmos verify {files.certificate} --key {files.public_keys}")
        return
    complete = f"\nDeployments registry: tier {files.tier} of 3"
    if files.missing:
        form = f"llmos report {model} --questions answers.toml"
        click.echo(f"{complete}; people must answer: {', '.join(files.missing)}\n  {form}")
    else:
        click.echo(f"{complete}, complete")
    click.echo(f"\nNext: llmos verify {files.certificate} --key {files.public_keys}")
