"""`gsmooth report`: table and picture of finished or running stores."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gsmooth_lightning.certify.store import Record, read, read_identity
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.figures import report_figure
from gsmooth_lightning.report.tables import attack_rows, bound_rows, certificate_rows, markdown
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import data_module, images_in_words


def report(cfg: DictConfig) -> str:
    """Writes report.md and report.png, prints and returns the table.

    Attack stores are joined by image to the certificate stores named before them.
    """
    columns: dict[str, dict[str, str]] = {}
    certificates: list[Record] = []
    certified_in = ""
    attacked: list[Record] = []
    figure_of: DictConfig | None = None
    for folder in map(Path, [cfg.stores] if isinstance(cfg.stores, str) else cfg.stores):
        kind, records = read_identity(folder)["command"], read(folder)
        if not records:
            raise RequestError(f"{folder} holds no finished image yet; report it later")
        settings = OmegaConf.load(folder / "config.yaml")
        assert isinstance(settings, DictConfig)
        if kind == "certify":
            certificates, certified_in, figure_of = records, folder.name, settings
            columns[folder.name] = certificate_rows(
                records, instantiate(settings.threat), images_in_words(settings), cfg.radii
            )
        elif kind == "attack":
            attacked = records
            columns.setdefault(certified_in or folder.name, {}).update(attack_rows(records, certificates))
        elif kind == "bound":
            columns[folder.name] = bound_rows(records)
        else:
            raise RequestError(f"{folder} is a {kind} run; name folders written by certify, bound or attack")
    table = markdown(columns)
    out = Path(cfg.out or folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(table + "\n")
        if figure_of is not None:
            visited = data_module(figure_of).visited
            images = {int(i): x for x, _, i in (visited[k] for k in range(len(visited)))}
            figure = report_figure(certificates, instantiate(figure_of.threat), images, attacked)
            figure.savefig(out / "report.png", dpi=150)
    except OSError as failure:
        raise RequestError(f"cannot write the report to {out} ({failure.strerror}); set out=FOLDER") from failure
    print(table)
    print(f"report: {out / 'report.md'}" + (f" and {out / 'report.png'}" if figure_of is not None else ""))
    return table


def main() -> None:
    command("report", report)


if __name__ == "__main__":
    main()
