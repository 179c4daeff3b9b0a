# AnyEvent::Fork, as it is, drives afork's server.
#
#    perl interop_client.pl SERVER SCENARIO [DESCRIPTOR]
#
# SERVER is the path of afork-serve.  DESCRIPTOR is the socket of a process that
# exists already: then all processes are forked from that.  Each scenario is one
# sub below; it prints what a test then compares.
use strict;
use warnings;

use AnyEvent;
use AnyEvent::Util ();
use AnyEvent::Fork;
use IO::FDPass;

my ($server, $scenario, $descriptor) = @ARGV;
$AnyEvent::Fork::PERL = $server;
$| = 1;

alarm 10; # a hang must end, whatever it waits in

my $root;
if (defined $descriptor && $scenario ne "to_fh") {
   open my $sock, "+<&=$descriptor" or die;
   $root = AnyEvent::Fork->new_from_fh($sock);
}

sub fresh { $root ? $root->fork : AnyEvent::Fork->new }

# The socket that run has given, set to blocking as is usual for tests.
sub entered {
   my ($proc, $function) = @_;
   $proc->run($function, my $cv = AE::cv);
   my $fh = $cv->recv;
   AnyEvent::Util::fh_nonblocking $fh, 0;
   $fh
}

sub answer { my ($fh) = @_; local $/; my $text = <$fh>; $text // "" }

sub ended { # exit status of a direct child, whose object goes
   my $watcher = AE::child $_[0]->pid, (my $cv = AE::cv);
   undef $_[0]; # the caller's, so that nobody has it any more
   ($cv->recv)[1]
}

sub closed { # wait for the end of a process that was not run
   my ($proc) = @_;
   $proc->to_fh(my $cv = AE::cv);
   my $fh = $cv->recv;
   AnyEvent::Util::fh_nonblocking $fh, 0;
   my $n = sysread $fh, my $buf, 1;
   defined $n ? "eof" : $!{ECONNRESET} ? "eof" : "error $!"
}

my $SHOW = <<'PYTHON';
def show(sock, *args):
    sock.sendall(repr(args).encode())
PYTHON

my %scenario = (
   eval => sub {
      my $proc = fresh()
         ->eval("import os; kept = args, type(args).__name__", "a" x 3, "", "\xff\x00")
         ->eval("def tell(sock):\n  sock.sendall(repr((kept, __name__)).encode())")
         ->eval("") ->eval("seen = 'args' in globals(); del args");
      $proc->eval("def tell2(sock):\n  sock.sendall(repr(seen).encode())");
      print answer (entered $proc->fork, "tell"), "\n";
      print answer (entered $proc, "__main__::tell2"), "\n";
   },
   arguments => sub {
      pipe my $r, my $w or die;
      my $proc = fresh()->eval(<<'PYTHON')
def show(sock, *args):
    kinds = [type(a).__name__ for a in args]
    args[2].write(b"through the pipe")
    flags = sock.gettimeout(), [a for a in args if isinstance(a, bytes)]
    sock.sendall(repr((kinds, flags)).encode())
PYTHON
         ->send_arg("s1", "")->send_fh($w)->send_arg("x" x 130, "\xff\x00")->send_arg;
      undef $w;
      print answer (entered $proc, "show"), "\n";
      local $/;
      print <$r>, "\n";
   },
   fork => sub { # arguments are copied at the fork, later ones are not shared
      my $proc = fresh()->eval($SHOW)->send_arg("all");
      my $one = $proc->fork->send_arg("one");
      $proc->send_arg("later");
      my $two = $proc->fork->eval("generation = 2");
      my $three = $two->fork->send_arg("three");
      my $four = $three->fork->eval("assert generation == 2")->send_arg("four");
      print answer (entered $_, "show"), "\n" for $four, $one, $three, $two, $proc;
   },
   require => sub {
      my $proc = fresh()->require("json", "os::path")->eval(<<'PYTHON');
def tell(sock):
    sock.sendall(repr((json.loads("[1]"), os.path.basename("/a/b"))).encode())
PYTHON
      print answer (entered $proc, "tell"), "\n";
      $proc = fresh();
      $proc->run("os::path::abspath", my $cv = AE::cv); # needs a path: a TypeError
      my $fh = $cv->recv;
      AnyEvent::Util::fh_nonblocking $fh, 0;
      print "after it: ", answer ($fh), "\n";
   },
   echo => sub { # bytes sent behind run, before there is a process, are its own
      my $proc = fresh()->eval(<<'PYTHON');
def echo(sock):
    with sock, sock.makefile("rwb") as stream:
        for line in stream:
            stream.write(line.upper())
PYTHON
      my $fh = entered $proc, "echo";
      syswrite $fh, "hello\n" x 1000;
      shutdown $fh, 1;
      my $text = answer $fh;
      print length $text, " ", substr ($text, -6);
   },
   errors => sub {
      for my $code ("1 / 0", "def def", "import no_such_module") {
         print "$code: ", closed (fresh()->eval($code)), "\n";
      }
      for my $function ("nothing", "json::nothing", "") {
         print "run $function: ", answer (entered (fresh(), $function)), "\n";
      }
      my $proc = fresh()->eval("1 / 0");
      my $child = $proc->fork; # all in its socket before it exists
      print "fork after an error: ", closed ($proc), " ", closed ($child), "\n";
      $proc = fresh()->eval($SHOW);
      print "the next: ", answer (entered $proc, "show"), "\n";
   },
   statuses => sub {
      my $new = sub { AnyEvent::Fork->new_exec };
      print "eof: ", ended ($new->()), "\n";
      print "exit: ", ended ($new->()->eval("import sys; sys.exit(3)")) >> 8, "\n";
      print "error: ", ended ($new->()->eval("1 / 0")) >> 8, "\n";
      my $proc = $new->();
      my $pid = $proc->pid;
      my $watcher = AE::child $pid, (my $cv = AE::cv);
      my $fh = entered $proc->eval("def f(sock): raise SystemExit(5)"), "f";
      print "function: ", (($cv->recv)[1] >> 8), "\n";
   },
   big => sub {
      my $size = 5_000_000;
      my $text = pack "N*", 1 .. $size / 4;
      my $proc = fresh()->eval(<<'PYTHON', $text)
import hashlib
first = hashlib.sha256(args[0]).hexdigest()
def show(sock, text):
    sock.sendall(f"{first} {hashlib.sha256(text).hexdigest()} {len(text)}".encode())
PYTHON
         ->send_arg($text);
      require Digest::SHA;
      my $sum = Digest::SHA::sha256_hex ($text);
      my ($first, $second, $len) = split / /, answer (entered $proc, "show");
      print $first eq $sum && $second eq $sum ? "same" : "different", " $len\n";
   },
   fan_out => sub {
      my $proc = fresh()->eval($SHOW)->send_arg("all");
      my (@fh, %answer);
      my $cv = AE::cv;
      for my $n (1 .. 50) {
         $cv->begin;
         $proc->fork->send_arg($n)->run("show", sub {
            $fh[$n] = shift;
            AnyEvent::Util::fh_nonblocking $fh[$n], 0;
            $cv->end;
         });
      }
      $cv->recv;
      $answer{answer $fh[$_]}++ for 1 .. 50;
      print scalar keys %answer, " ", exists $answer{"(b'all', b'50')"} ? 1 : 0, "\n";
   },
   taken => sub { # the process that was handed over, itself
      my $proc = $root->eval($SHOW)->send_arg("perl");
      my $child = $proc->fork->send_arg("child");
      print answer (entered $_, "show"), "\n" for $child, $proc;
   },
   to_fh => sub { # hand a process over, through the descriptor
      open my $sock, "+<&=$descriptor" or die;
      my $proc = AnyEvent::Fork->new->eval($SHOW)->send_arg("perl");
      $proc->to_fh(my $cv = AE::cv);
      IO::FDPass::send fileno $sock, fileno $cv->recv or die "send: $!";
      print "sent\n";
      sysread $sock, my $buf, 1; # until the test has done with it
   },
);

$scenario{$scenario}->();
