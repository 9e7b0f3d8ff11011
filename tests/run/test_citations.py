"""A run's card names the papers of what it used."""

from __future__ import annotations

from pathlib import Path

from unisd import recipes
from unisd.config import UniSDConfig
from unisd.run.citations import UNISD, papers


def test_papers_of_recipe_weight_target_and_term(tmp_path: Path) -> None:
    options = {"token_weights": ["entropy_trust"], "target": "geometric", "terms": ["nsd:kl=0.01"]}
    config = UniSDConfig(output_dir=str(tmp_path), **options)
    assert papers("sdft", config) == {
        UNISD: "UniSD",
        "2601.19897": "recipe `sdft`",
        "2604.02288": "weight `entropy_trust`",
        "2607.02502": "target `geometric`",
        "2609.11699": "term `nsd:kl=0.01`",
    }
    assert list(papers("unisd-star", UniSDConfig(output_dir=str(tmp_path)))) == [UNISD]


def test_recipes_of_a_paper_name_it() -> None:
    of_papers = (
        "avsd",
        "dash",
        "demopsd",
        "gkd",
        "nsd",
        "oasis",
        "op2sd",
        "opsd",
        "pw-opsd",
        "sdft",
        "sdpo",
        "ssd",
    )
    assert all("arXiv " in recipes.load(name).description for name in of_papers)
