/* The program that costs least to start, for bench/scale.py. */
int
main(void)
{
    return 0;
}
