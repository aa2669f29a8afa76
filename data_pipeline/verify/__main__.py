"""`python -m data_pipeline.verify`."""

from data_pipeline.verify.verify import main

if __name__ == "__main__":
    main()
