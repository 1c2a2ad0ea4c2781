"""`quantkit recipes`: what can be asked of convert."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that ship with quantkit, or show one.

    \b
    quantkit recipes
    quantkit recipes show w4a16-gptq > mine.yaml      # a start for a recipe of your own
    """
    if context.invoked_subcommand is None:
        context.invoke(list_all)


@recipes.command("list")
def list_all() -> None:
    """Every shipped recipe and what it is for."""
    from quantkit.cli.tables import plain_table, results_console
    from quantkit.conversion.recipe import list_recipes

    table = plain_table("recipe", "")
    for recipe in list_recipes():
        table.add_row(recipe.name, recipe.description)
    results_console().print(table)


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print one recipe, by name or path, as it stands in its file, if it is valid."""
    from quantkit.conversion.recipe import Recipe, recipe_text

    Recipe.load(name)
    click.echo(recipe_text(name).rstrip())
