"""One trained adapter, several formats, merged once.

    python examples/export_formats.py ADAPTER [--formats lora merged_16bit gguf] [--output formats]

ADAPTER is a folder that ``export_model(model, "lora", ...)`` wrote, such as the quickstart's
``quickstart_output/lora``. Its base model is found by itself.
"""

import argparse
import sys

from qlora_kit import available_exporters, export_model, load_quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", help="a folder with a saved adapter")
    parser.add_argument("--formats", nargs="+", default=["lora", "merged_16bit", "gguf"])
    parser.add_argument("--output", default="formats")
    args = parser.parse_args()
    print(f"Formats on this machine: {', '.join(available_exporters())}")

    model = load_quantized(args.adapter, max_seq_length=512, is_trainable=False)
    # A format that fails is reported in .failures and leaves the others alone.
    results = export_model(model, args.formats, args.output, overwrite=True)
    for name, artifact in results.items():
        print(f"\n{name}: {artifact.path} ({artifact.size / 1e6:.1f} MB, {artifact.seconds:.0f} s)")
        for check in artifact.verification.checks:
            print(f"  {'ok ' if check.passed else 'BAD'} {check.name}: {check.detail}")
    for name, error in results.failures.items():
        print(f"\n{name} could not be written: {error}")
    sys.exit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
