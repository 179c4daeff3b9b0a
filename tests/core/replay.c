/* In the place of libFuzzer: gives each file named to the harness, once. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
replay(const char *name)
{
    FILE *file = fopen(name, "rb");
    uint8_t *data = malloc(1 << 20), *exact;
    size_t size;

    if (!file || !data) {
        perror(name);
        exit(1);
    }
    size = fread(data, 1, 1 << 20, file);
    fclose(file);
    exact = malloc(size ? size : 1);
    if (!exact)
        exit(1);
    for (size_t i = 0; i < size; i++)
        exact[i] = data[i];
    free(data);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    puts(name);
}

int
main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        replay(argv[i]);
    return 0;
}
