//! Grid of a bench: every combination of some parameters' values.

use crate::args::BenchArgs;
use crate::report::{Format, Report, Row};
use anyhow::Result;
use clap::Args;
use embarcadero_client::Order;
use serde_json::Value;

#[derive(Args, Clone)]
pub(crate) struct GridArgs {
    #[command(flatten)]
    pub bench: BenchArgs,
    /// Parameter and its values, such as brokers=1,4,32; every combination is run. Parameters: brokers, publishers,
    /// message-bytes, batch-size, order, ack.
    #[arg(long, value_name = "PARAMETER=VALUES", value_parser = axis)]
    over: Vec<Axis>,
}

/// Parameter with one of its values.
#[derive(Clone)]
struct Setting {
    text: String,
    value: Parameter,
}

#[derive(Clone, Copy)]
enum Parameter {
    Brokers(u32),
    Publishers(u32),
    MessageBytes(usize),
    BatchSize(usize),
    Order(Order),
    Ack(u8),
}

type Axis = Vec<Setting>;

fn axis(text: &str) -> Result<Axis, String> {
    let (name, values) = text.split_once('=').ok_or("must be PARAMETER=VALUE,VALUE,..")?;
    let setting = |value: &str| {
        let number = || value.parse().map_err(|error| format!("{value}: {error}"));
        Ok(match name {
            "brokers" => Parameter::Brokers(number()?),
            "publishers" => Parameter::Publishers(number()?),
            "message-bytes" => Parameter::MessageBytes(number()? as usize),
            "batch-size" => Parameter::BatchSize(number()? as usize),
            "order" => Parameter::Order(value.parse()?),
            "ack" => Parameter::Ack(value.parse().map_err(|error| format!("{value}: {error}"))?),
            _ => return Err(format!("there is no parameter {name}")),
        })
    };
    values.split(',').map(|value| Ok(Setting { text: format!("{name}={value}"), value: setting(value)? })).collect()
}

impl Setting {
    fn apply(&self, args: &mut BenchArgs) {
        match self.value {
            Parameter::Brokers(value) => args.brokers = value,
            Parameter::Publishers(value) => args.publishers = value,
            Parameter::MessageBytes(value) => args.message_bytes = value,
            Parameter::BatchSize(value) => args.batch_size = Some(value),
            Parameter::Order(value) => args.order = value,
            Parameter::Ack(value) => args.ack = value,
        }
    }
}

/// One combination of values.
pub(crate) struct Point {
    pub bench: BenchArgs,
    /// Values of the combination, for people.
    label: String,
}

impl Point {
    /// Prints the rows that were measured at this combination.
    pub(crate) fn print(&self, parameters: Value, rows: &[Row]) -> Result<()> {
        if self.bench.format() == Format::Text && !self.label.is_empty() {
            println!("{}", self.label);
        }
        Report::new(parameters, self.bench.format()).print(rows)
    }
}

impl GridArgs {
    /// Every combination of values; a single one if no grid was asked for.
    ///
    /// # Errors
    /// A combination cannot be run.
    pub(crate) fn points(&self) -> Result<Vec<Point>> {
        let mut points = vec![Point { bench: self.bench.clone(), label: String::new() }];
        for axis in &self.over {
            let extend = |point: &Point| {
                axis.iter()
                    .map(|setting| {
                        let mut bench = point.bench.clone();
                        setting.apply(&mut bench);
                        Point { bench, label: format!("{} {}", point.label, setting.text).trim_start().to_owned() }
                    })
                    .collect::<Vec<_>>()
            };
            points = points.iter().flat_map(extend).collect();
        }
        points.iter().try_for_each(|point| point.bench.check())?;
        Ok(points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        grid: GridArgs,
    }

    fn labels(arguments: &[&str]) -> Vec<String> {
        let command = Command::try_parse_from(["bench"].iter().chain(arguments)).unwrap();
        command.grid.points().unwrap().into_iter().map(|point| point.label).collect()
    }

    #[test]
    fn every_combination_is_a_point() {
        assert_eq!(labels(&[]), [""]);
        assert_eq!(
            labels(&["--over", "brokers=1,4", "--over", "order=total,strong"]),
            ["brokers=1 order=total", "brokers=1 order=strong", "brokers=4 order=total", "brokers=4 order=strong"]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in ["brokers", "brokers=", "brokers=x", "speed=1", "order=none-such", "ack=300"] {
            assert!(Command::try_parse_from(["bench", "--over", wrong]).is_err(), "{wrong}");
        }
        for wrong in ["brokers=0", "brokers=33", "publishers=0", "message-bytes=0"] {
            let command = Command::try_parse_from(["bench", "--over", wrong]).unwrap();
            assert!(command.grid.points().is_err(), "{wrong}");
        }
    }
}
