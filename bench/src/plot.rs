//! `bench plot`: draws what benches printed with `--json`, as SVG and PNG.
//!
//! There are four kinds of picture, each drawn where the rows have data for it:
//!
//! - a figure over a parameter that varies,
//! - latency over goodput,
//! - the distribution of latencies,
//! - figures as parts of their ceilings.

use crate::ceiling::NOTHING_TO_DO;
use crate::report::human;
use anyhow::{Context, Result, bail};
use clap::Args;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::ops::Range;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub(crate) struct PlotArgs {
    /// Files of rows; - stands for standard input.
    #[arg(required = true)]
    rows: Vec<PathBuf>,
    /// Directory for the pictures.
    #[arg(long, default_value = ".")]
    out: PathBuf,
    /// Formats of the pictures.
    #[arg(long, value_delimiter = ',', default_value = "svg,png")]
    formats: Vec<Picture>,
    /// TrueType font of the labels; by default DejaVu Sans where Debian and RHEL install it.
    #[arg(long)]
    font: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Picture {
    Svg,
    Png,
}

/// Paths of DejaVu Sans in Debian's package fonts-dejavu-core and RHEL's dejavu-sans-fonts.
const FONTS: [&str; 2] =
    ["/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", "/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf"];
/// Least value on a logarithmic axis, and least ceiling. A nanosecond is 1e-9.
const LEAST: f64 = 1e-12;
const WIDTH: u32 = 960;
const HEIGHT: u32 = 600;
/// Bytes of the longest line in a file of rows.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Largest number of rows in a file.
const MAX_ROWS: usize = 100_000;
/// Largest number of bars in one picture; more go to another.
const MAX_BARS: usize = 64;

#[derive(Clone, Deserialize)]
struct Ceiling {
    name: String,
    value: f64,
}

/// Row that [`crate::report`] has printed as JSON.
#[derive(Clone, Deserialize)]
struct Printed {
    name: String,
    value: f64,
    unit: String,
    ceiling: Option<Ceiling>,
    #[serde(default)]
    parameters: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    distribution: Vec<(f64, f64)>,
}

/// Range of every figure.
const FIGURES: Range<f64> = 0.0..1e18;

impl Printed {
    /// Checks the row: names become names of files, and figures that no bench prints would make axes that cannot be drawn.
    fn check(&self) -> Result<()> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if let Some(wrong) = self.parameters.keys().chain([&self.name]).find(|name| !name.bytes().all(is_name)) {
            bail!("{wrong:?} is no name of a figure or a parameter: letters, digits, points, _ and -");
        }
        let ceiling = self.ceiling.iter().map(|ceiling| ceiling.value);
        let values = self.distribution.iter().map(|(_, value)| *value);
        let numbers = self.parameters.values().filter_map(serde_json::Value::as_f64);
        let mut figures = [self.value].into_iter().chain(ceiling).chain(values).chain(numbers);
        if let Some(wrong) = figures.find(|figure| !FIGURES.contains(figure)) {
            bail!("{} has a figure of {wrong}; it must be 0 to {:e}", self.name, FIGURES.end);
        }
        if let Some((wrong, _)) = self.distribution.iter().find(|(quantile, _)| !(0.0..=1.0).contains(quantile)) {
            bail!("{} has a quantile of {wrong}; it must be 0 to 1", self.name);
        }
        Ok(())
    }

    fn number(&self, parameter: &str) -> Option<f64> {
        self.parameters.get(parameter)?.as_f64()
    }

    /// Parameters of `names` that the row has, for people.
    fn label(&self, names: &BTreeSet<String>) -> String {
        let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let shown = names.iter().filter_map(|name| Some(format!("{name} {}", text(self.parameters.get(name)?))));
        shown.collect::<Vec<_>>().join(", ")
    }
}

/// Unit of an axis of quantiles q, which is logarithmic in 1 / (1 - q), so that each nine takes as much room.
const PERCENTILE: &str = "percentile";

/// Value without the last digits, in which sums of tenths differ from tenths.
fn rounded(value: f64) -> f64 {
    (value * 1e9).round() / 1e9
}

struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

/// Axis of a chart.
struct Axis {
    label: String,
    unit: String,
    logarithmic: bool,
}

impl Axis {
    fn new(label: impl Into<String>, unit: impl Into<String>, logarithmic: bool) -> Self {
        Self { label: label.into(), unit: unit.into(), logarithmic }
    }

    fn show(&self, value: f64) -> String {
        match self.unit.as_str() {
            PERCENTILE => format!("p{}", rounded(100.0 - 100.0 / value)),
            "" => rounded(value).to_string(),
            unit => human(value, unit),
        }
    }

    fn range(&self, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
        let (least, most) =
            values.fold((f64::INFINITY, 0f64), |(least, most), value| (least.min(value), most.max(value)));
        let (least, most) = (least.max(LEAST), most.max(LEAST));
        if self.logarithmic { least / 1.2..most * 1.2 } else { 0.0..most * 1.1 }
    }
}

enum Content {
    Lines(Axis, Axis, Vec<Series>),
    /// Names and lengths of bars; length 1 is the ceiling.
    Bars(Vec<(String, f64)>),
}

struct Chart {
    file: String,
    title: String,
    content: Content,
}

fn read_rows(path: &Path) -> Result<Vec<Printed>> {
    let mut input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Box::new(std::io::BufReader::new(file))
    };
    let mut rows = Vec::new();
    for number in 1.. {
        let mut line = String::new();
        let place = || format!("{}, line {number}", path.display());
        if std::io::Read::take(&mut input, MAX_LINE_BYTES).read_line(&mut line).with_context(place)? == 0 {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        let row: Printed = serde_json::from_str(&line).with_context(place)?;
        row.check().with_context(place)?;
        rows.push(row);
        if rows.len() > MAX_ROWS {
            bail!("{} has more than {MAX_ROWS} rows", path.display());
        }
    }
    Ok(rows)
}

/// Names of the parameters that differ between rows, without the duration of a run.
fn varying(rows: &[&Printed]) -> BTreeSet<String> {
    let names: BTreeSet<_> = rows.iter().flat_map(|row| row.parameters.keys()).collect();
    let differs =
        |name: &&String| rows.windows(2).any(|pair| pair[0].parameters.get(*name) != pair[1].parameters.get(*name));
    names.into_iter().filter(|name| *name != "seconds").filter(differs).cloned().collect()
}

/// Series by label, each in order of `x`.
fn series(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Series> {
    let mut by_label = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for (label, point) in points {
        by_label.entry(label).or_default().push(point);
    }
    let sorted = by_label.into_iter().map(|(label, mut points)| {
        points.sort_by(|left, right| left.0.total_cmp(&right.0));
        Series { label, points }
    });
    sorted.collect()
}

/// Charts of each figure over each numeric parameter that varies. Latencies are on a logarithmic scale.
fn over_parameters(rows: &[Printed]) -> Vec<Chart> {
    let mut charts = Vec::new();
    let names: BTreeSet<_> = rows.iter().map(|row| &row.name).collect();
    for name in names.into_iter().filter(|name| !name.starts_with(LATENCY_VS_LOAD)) {
        let of_name: Vec<_> = rows.iter().filter(|row| row.name == *name && row.value > 0.0).collect();
        let varying = varying(&of_name);
        for parameter in &varying {
            let others: BTreeSet<_> = varying.iter().filter(|other| *other != parameter).cloned().collect();
            let numbers = || of_name.iter().filter_map(|row| Some((row, row.number(parameter).filter(|x| *x > 0.0)?)));
            let ours = numbers().map(|(row, x)| (row.label(&others), (x, row.value)));
            let ceilings = numbers().filter_map(|(row, x)| {
                let ceiling = row.ceiling.as_ref()?;
                Some((format!("{} {}", ceiling.name, row.label(&others)), (x, ceiling.value)))
            });
            let lines: Vec<_> = series(ours.chain(ceilings)).into_iter().filter(|line| line.points.len() > 1).collect();
            let Some(first) = of_name.first().filter(|_| !lines.is_empty()) else { continue };
            charts.push(Chart {
                file: format!("{name}.over.{parameter}"),
                title: name.clone(),
                content: Content::Lines(
                    Axis::new(parameter, "", true),
                    Axis::new(name, &first.unit, first.unit == "s"),
                    lines,
                ),
            });
        }
    }
    charts
}

const LATENCY_VS_LOAD: &str = "latency_vs_load.";
const GOODPUT: &str = ".goodput";

/// Charts of latency quantiles over the goodput that the same load reached, for acknowledgement and for delivery.
fn latency_over_goodput(rows: &[Printed]) -> Vec<Chart> {
    let goodputs = || rows.iter().filter(|row| row.name.starts_with(LATENCY_VS_LOAD) && row.name.ends_with(GOODPUT));
    let whats: BTreeSet<_> = goodputs().map(|row| row.name.trim_end_matches(GOODPUT)).collect();
    let chart = |what: &str| {
        let goodput_of = |row: &Printed| {
            let same =
                |other: &&Printed| other.name.strip_suffix(GOODPUT) == Some(what) && other.parameters == row.parameters;
            Some(goodputs().find(same)?.value)
        };
        let points = rows.iter().filter_map(|row| {
            let quantile = row.name.strip_prefix(what)?.strip_prefix('.').filter(|rest| rest.starts_with('p'))?;
            Some((quantile.to_owned(), (goodput_of(row)?, row.value)))
        });
        Chart {
            file: what.to_owned(),
            title: what.to_owned(),
            content: Content::Lines(
                Axis::new("goodput", "B/s", false),
                Axis::new("latency", "s", true),
                series(points),
            ),
        }
    };
    whats.into_iter().map(chart).collect()
}

/// Chart of the latency at each percentile of the messages.
fn distributions(rows: &[Printed]) -> Vec<Chart> {
    let with: Vec<_> = rows.iter().filter(|row| row.distribution.len() > 1).collect();
    let varying = varying(&with);
    let points = with.iter().flat_map(|row| {
        let label = format!("{} {}", row.name.trim_end_matches(".p50"), row.label(&varying));
        let points = row.distribution.iter().filter(|(quantile, _)| *quantile < 1.0);
        points.map(move |(quantile, value)| (label.clone(), (1.0 / (1.0 - quantile), *value)))
    });
    vec![Chart {
        file: "latency.distribution".to_owned(),
        title: "latency by percentile".to_owned(),
        content: Content::Lines(Axis::new("", PERCENTILE, true), Axis::new("latency", "s", true), series(points)),
    }]
}

/// Charts of figures as parts of their ceilings. Latencies are left out, as they are many times those of a loop with
/// nothing to do.
fn ratios(rows: &[Printed]) -> Vec<Chart> {
    let has = |ceiling: &Ceiling| ceiling.value >= LEAST && ceiling.name != NOTHING_TO_DO;
    let with = || rows.iter().filter(|row| row.ceiling.as_ref().is_some_and(has));
    let varying = varying(&with().collect::<Vec<_>>());
    let bars: Vec<_> = with()
        .filter_map(|row| {
            let ceiling = row.ceiling.as_ref()?;
            let label = format!("{} / {} {}", row.name, ceiling.name, row.label(&varying));
            Some((label, row.value / ceiling.value))
        })
        .collect();
    let pictures = bars.chunks(MAX_BARS).enumerate().map(|(number, bars)| Chart {
        file: if number == 0 { "ratios".to_owned() } else { format!("ratios.{}", number + 1) },
        title: "figures as parts of their ceilings".to_owned(),
        content: Content::Bars(bars.to_vec()),
    });
    pictures.collect()
}

fn draw_lines<DB, X, Y>(
    area: &DrawingArea<DB, Shift>,
    title: &str,
    (x_axis, x): (&Axis, X),
    (y_axis, y): (&Axis, Y),
    lines: &[Series],
) -> Result<()>
where
    DB: DrawingBackend<ErrorType: 'static>,
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let mut builder = ChartBuilder::on(area);
    builder.caption(title, (FONT, 22)).margin(16).x_label_area_size(48).y_label_area_size(100);
    let mut chart = builder.build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(&x_axis.label)
        .y_desc(&y_axis.label)
        .x_label_formatter(&|value| x_axis.show(*value))
        .y_label_formatter(&|value| y_axis.show(*value))
        .label_style((FONT, 14))
        .light_line_style(WHITE)
        .draw()?;
    for (index, line) in lines.iter().enumerate() {
        let style = Palette99::pick(index).stroke_width(2);
        let points = line.points.iter().copied();
        chart
            .draw_series(LineSeries::new(points, style).point_size(3))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
    }
    if lines.iter().any(|line| !line.label.is_empty()) {
        let mut labels = chart.configure_series_labels();
        labels.label_font((FONT, 13)).background_style(WHITE.mix(0.8)).border_style(BLACK);
        labels.position(SeriesLabelPosition::UpperLeft).draw()?;
    }
    Ok(())
}

fn draw_bars<DB: DrawingBackend<ErrorType: 'static>>(
    area: &DrawingArea<DB, Shift>,
    title: &str,
    bars: &[(String, f64)],
) -> Result<()> {
    let longest = bars.iter().map(|(_, ratio)| *ratio).fold(1.0, f64::max);
    let mut builder = ChartBuilder::on(area);
    builder.caption(title, (FONT, 22)).margin(16).x_label_area_size(32);
    let mut chart = builder.build_cartesian_2d(0.0..longest * 1.1, 0.0..bars.len() as f64)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().label_style((FONT, 14)).draw()?;
    chart.draw_series(bars.iter().zip(1u32..).map(|((_, ratio), number)| {
        let top = (bars.len() as u32 - number) as f64;
        Rectangle::new([(0.0, top + 0.15), (*ratio, top + 0.85)], BLUE.mix(0.3).filled())
    }))?;
    chart.draw_series(bars.iter().zip(1u32..).map(|((name, ratio), number)| {
        let middle = (bars.len() as u32 - number) as f64 + 0.65;
        Text::new(format!("{name}: {ratio:.2}"), (longest * 0.01, middle), (FONT, 13))
    }))?;
    chart.draw_series(LineSeries::new([(1.0, 0.0), (1.0, bars.len() as f64)], BLACK))?;
    Ok(())
}

/// Name under which plotters knows the font.
const FONT: &str = "sans-serif";

impl Chart {
    fn draw_on<DB: DrawingBackend<ErrorType: 'static>>(&self, area: &DrawingArea<DB, Shift>) -> Result<()> {
        area.fill(&WHITE)?;
        match &self.content {
            Content::Bars(bars) => draw_bars(area, &self.title, bars)?,
            Content::Lines(x, y, lines) => {
                let points = || lines.iter().flat_map(|line| &line.points);
                let (xs, ys) = (x.range(points().map(|point| point.0)), y.range(points().map(|point| point.1)));
                match (x.logarithmic, y.logarithmic) {
                    (false, false) => draw_lines(area, &self.title, (x, xs), (y, ys), lines)?,
                    (false, true) => draw_lines(area, &self.title, (x, xs), (y, ys.log_scale()), lines)?,
                    (true, false) => draw_lines(area, &self.title, (x, xs.log_scale()), (y, ys), lines)?,
                    (true, true) => draw_lines(area, &self.title, (x, xs.log_scale()), (y, ys.log_scale()), lines)?,
                }
            }
        }
        Ok(area.present()?)
    }

    fn size(&self) -> (u32, u32) {
        match &self.content {
            Content::Lines(..) => (WIDTH, HEIGHT),
            Content::Bars(bars) => (WIDTH, 100 + 32 * bars.len() as u32),
        }
    }

    fn draw(&self, directory: &Path, format: Picture) -> Result<PathBuf> {
        let path = |extension| directory.join(format!("{}.{extension}", self.file));
        Ok(match format {
            Picture::Svg => {
                let path = path("svg");
                self.draw_on(&SVGBackend::new(&path, self.size()).into_drawing_area())?;
                path
            }
            Picture::Png => {
                let path = path("png");
                self.draw_on(&BitMapBackend::new(&path, self.size()).into_drawing_area())?;
                path
            }
        })
    }
}

/// All charts that have values: an axis without a value has no range.
fn charts(rows: &[Printed]) -> Vec<Chart> {
    let all = [over_parameters(rows), latency_over_goodput(rows), distributions(rows), ratios(rows)];
    let has_points = |chart: &Chart| match &chart.content {
        Content::Lines(_, _, lines) => lines.iter().any(|line| !line.points.is_empty()),
        Content::Bars(bars) => !bars.is_empty(),
    };
    all.into_iter().flatten().filter(has_points).collect()
}

fn prepare_font(chosen: Option<&Path>) -> Result<()> {
    let found = || FONTS.iter().map(Path::new).find(|path| path.exists());
    let path =
        chosen.or_else(found).context("no font for labels; install fonts-dejavu-core, or name one with --font")?;
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    // plotters keeps it for as long as the program runs.
    register_font(FONT, FontStyle::Normal, bytes.leak())
        .map_err(|_| anyhow::anyhow!("{} is not a TrueType font", path.display()))
}

pub(crate) fn run(args: &PlotArgs) -> Result<()> {
    let mut rows = Vec::new();
    for path in &args.rows {
        rows.extend(read_rows(path)?);
    }
    let charts = charts(&rows);
    if charts.is_empty() {
        bail!("nothing to draw: no row has a ceiling, a distribution or a parameter that varies");
    }
    prepare_font(args.font.as_deref())?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    for chart in &charts {
        for format in &args.formats {
            println!("{}", chart.draw(&args.out, *format)?.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Format, Report, Row};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn printed(parameters: Value, row: Row) -> Printed {
        let line = Report::new(parameters, Format::Json).object(&row).to_string();
        let row: Printed = serde_json::from_str(&line).unwrap();
        row.check().unwrap();
        row
    }

    fn rows() -> Vec<Printed> {
        let goodput = |bytes: u32, brokers: u32| {
            let row = Row::new("publish.goodput", "B/s", &[1e9, 3e9, 2e9]).with_ceiling("tcp", &[4e9]);
            printed(json!({ "message_bytes": bytes, "brokers": brokers, "order": "strong" }), row)
        };
        let loaded = |load: f64| {
            let parameters = json!({ "load": load });
            let p99 = Row::new("latency_vs_load.publish_to_ack.p99", "s", &[load * 1e-3]);
            let distribution = vec![(0.0, 1e-6), (0.5, 2e-6), (1.0, 1e-3)];
            let p50 = Row::new("latency_vs_load.publish_to_ack.p50", "s", &[2e-6]).with_distribution(distribution);
            let goodput = Row::new("latency_vs_load.publish_to_ack.goodput", "B/s", &[load * 1e9]);
            [goodput, p50, p99].map(|row| printed(parameters.clone(), row))
        };
        let goodputs = [goodput(64, 1), goodput(1024, 1), goodput(64, 4), goodput(1024, 4)];
        goodputs.into_iter().chain(loaded(0.1)).chain(loaded(0.5)).collect()
    }

    #[test]
    fn each_kind_of_figure_has_its_picture() {
        let charts = charts(&rows());
        let files: Vec<_> = charts.iter().map(|chart| chart.file.as_str()).collect();
        assert_eq!(
            files,
            [
                "publish.goodput.over.brokers",
                "publish.goodput.over.message_bytes",
                "latency_vs_load.publish_to_ack",
                "latency.distribution",
                "ratios"
            ]
        );
        let Content::Lines(_, _, lines) = &charts[1].content else { unreachable!() };
        let labels: Vec<_> = lines.iter().map(|line| line.label.as_str()).collect();
        assert_eq!(labels, ["brokers 1", "brokers 4", "tcp brokers 1", "tcp brokers 4"]);
        assert_eq!(lines[0].points, [(64.0, 2e9), (1024.0, 2e9)]);
        let Content::Lines(_, _, lines) = &charts[2].content else { unreachable!() };
        assert_eq!(lines[1].points, [(1e8, 1e-4), (5e8, 5e-4)]);
        let Content::Bars(bars) = &charts[4].content else { unreachable!() };
        assert_eq!(bars[0], ("publish.goodput / tcp brokers 1, message_bytes 64".to_owned(), 0.5));
    }

    #[test]
    fn axes_read_well() {
        let percentile = Axis::new("", PERCENTILE, true);
        assert_eq!([1.0, 2.0, 10.0, 1000.0].map(|value| percentile.show(value)), ["p0", "p50", "p90", "p99.9"]);
        assert_eq!(Axis::new("", "", false).show(0.1 + 0.2), "0.3");
        assert_eq!(Axis::new("", "s", true).show(0.02), "20.00 ms");
    }

    fn figure() -> impl Strategy<Value = f64> {
        prop_oneof![1 => any::<f64>(), 3 => 0.0..1f64, 3 => 0.0..1e17f64, 1 => Just(0.0)]
    }

    #[test]
    fn what_would_be_no_file_is_refused() {
        for (name, parameter) in [("../x", "load"), ("x/y", "load"), ("x", "a/b"), ("x", "a b")] {
            let line = json!({ "name": name, "value": 1.0, "unit": "s", "parameters": { parameter: 1 } });
            assert!(serde_json::from_value::<Printed>(line).unwrap().check().is_err(), "{name} {parameter}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_figure_is_drawn_or_refused(
            name in prop_oneof![Just("any"), Just("latency_vs_load.x.goodput"), Just("latency_vs_load.x.p50")],
            (value, ceiling, parameter) in (figure(), figure(), figure()),
            points in vec((prop_oneof![0.0..=1f64, Just(1.0), figure()], figure()), 0..5),
        ) {
            let line = json!({
                "name": name, "value": value, "unit": "s", "ceiling": { "name": "bound", "value": ceiling },
                "parameters": { "load": parameter }, "distribution": points,
            });
            // What is not a number becomes null, which is refused.
            let Ok(row) = serde_json::from_value::<Printed>(line) else { return Ok(()) };
            if row.check().is_ok() {
                prepare_font(None).unwrap();
                let other = Printed { parameters: [("load".to_owned(), json!(7))].into(), ..row.clone() };
                let directory = tempfile::tempdir().unwrap();
                for chart in charts(&[row, other]) {
                    let [svg, png] = [Picture::Svg, Picture::Png].map(|format| chart.draw(directory.path(), format).unwrap());
                    prop_assert!(std::fs::read_to_string(svg).unwrap().contains("</svg>"));
                    prop_assert!(std::fs::read(png).unwrap().starts_with(b"\x89PNG"));
                }
            }
        }
    }
}
